"""Planned training steps: a call's joint graph as a task graph, the search, and the planner.

Passes that decide what a backward pass keeps stand on this floor: each states what it wants in
`PlanSettings`, and what comes out is a sequence of tasks that `graphopt.runtime` runs.
"""
