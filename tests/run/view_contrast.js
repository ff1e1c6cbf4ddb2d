// Texts whose contrast with what lies behind them is below 4.5.
(() => {
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4 });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b };
  const parse = (text) => text.match(/[\d.]+/g).map(Number);
  const behind = (e) => { let c = [...parse(getComputedStyle(document.body).backgroundColor)].slice(0, 3); const chain = [];
    for (; e; e = e.parentElement) chain.unshift(parse(getComputedStyle(e).backgroundColor));
    for (const [r, g, b, a = 1] of chain) c = c.map((v, k) => v * (1 - a) + [r, g, b][k] * a); return c };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    if (![...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !e.checkVisibility() || e.closest('script')) continue;
    const style = getComputedStyle(e), ink = e.closest('svg') ? style.fill : style.color;
    const [a, b] = [light(parse(ink)), light(behind(e))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push(`${e.tagName}.${e.className} ${ink}: ${e.textContent.slice(0, 40)}`);
  }
  return poor;
})()
