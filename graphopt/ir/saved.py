"""Former place of `graphopt.cost.saved`, kept until `graphopt.inspect.views` imports that."""

from graphopt.cost.saved import SavedTable, SavedValue, saved_by_graph, saved_table

__all__ = ["SavedTable", "SavedValue", "saved_by_graph", "saved_table"]
