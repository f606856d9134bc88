"""Programs behind `headrace bench` and `headrace demo`: emulated links, reference replay, figures."""
