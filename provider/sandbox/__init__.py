"""Other people's programs: templates and expressions, run in a process of their own, within bounds.

Nothing is imported here: the worker's process has this room, Jinja2 and JMESPath, and nothing else of the provider.
"""
