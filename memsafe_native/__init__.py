"""The compiled half of memsafe. Nothing but memsafe._native imports it."""
