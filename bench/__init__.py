"""How fast is it, and against which peer?"""
