"""A report from rows of the GPU benchmark: medians over shapes, crossovers, outliers, a roofline; HTML and PNG."""
