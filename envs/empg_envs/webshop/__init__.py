"""WebShop's text mode without a browser, a web server or a JVM, and generated shops for training.

Pages, clicks, goals, prices, rewards and search results equal those of the original simulator over the same
data. Three features are left out on purpose:

* the search words ``<r>``, ``<a>``, ``<c>`` and ``<q>``, by which the developers bypassed the search engine;
* the random choice of goals by weight: an index selects a goal, and the task keeps the ``weight``;
* steps after the purchase, which are refused.

A good reading order is ``shop`` (effects of clicks), ``pages`` and ``texts`` (observations), ``reward``,
``bm25`` with ``analyzer`` and ``porter`` (search), ``schema`` and ``goals`` (the loader's rules), ``store``
(the shared catalog), ``official`` and ``embedded`` (sources of catalogs), ``env``.
"""
