"""What people see: tables, log lines, pictures, TensorBoard, progress. Prints nothing.

In come decisions and measurements; out go lines of text and figures.
"""
