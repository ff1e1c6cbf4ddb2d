// Controls and regions that a screen reader would have no name for.
[...document.querySelectorAll('input, select, button, [role]')].filter((e) => e.checkVisibility() &&
  !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.labels?.length || e.textContent.trim()
    || ['status', 'alert', 'search'].includes(e.getAttribute('role')))).map((e) => e.outerHTML.slice(0, 100))
