"""WebShop's text mode without a browser, a web server or a JVM, and shops of our own to train in.

Pages, clicks, goals, prices, rewards and search results are those of the original simulator over the same
data. Three things are left out on purpose: the search words ``<r>``, ``<a>``, ``<c>`` and ``<q>``, with which
its developers listed products behind the search engine's back; the drawing of goals by weight (an index
names a goal; ``weight`` is kept in the task); and steps after the purchase, which are refused.

Read from the inside out: ``shop`` (what a click does), ``pages`` and ``texts`` (what it reads like),
``reward``, ``bm25`` with ``analyzer`` and ``porter`` (search), ``schema`` and ``goals`` (the loader's rules),
``store`` (the shared catalog), ``official`` and ``embedded`` (where catalogs come from), ``env``.
"""
