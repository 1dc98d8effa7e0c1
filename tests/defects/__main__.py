from .other_checkers import table

print(table())
