"""Small bridges to other libraries, each in a module of its name; none is loaded unless it is imported."""
