from .gradcheck import table

print(table())
