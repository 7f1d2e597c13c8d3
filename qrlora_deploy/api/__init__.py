"""The main jobs as functions, which take paths as well as objects; `import qrlora_deploy` offers them all."""
