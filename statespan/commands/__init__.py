"""The commands of `statespan`, one module each.

A module holds either a function of its own name, whose docstring is the help text and whose parameters are typer's, or
`app`, a typer.Typer with commands of its own. The module's name is the command's, a trailing underscore left out.
Modules import only what their options need; torch, ray, mlflow and optuna are imported inside functions, so that
`--help` is quick.
"""
