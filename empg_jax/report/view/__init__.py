"""The viewer: a run's episodes, credit and curves as one page, mailed as a file or served while it trains."""
