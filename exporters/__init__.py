"""Plug-ins that write a deployable form of a model, found through `qrlora_deploy.exporters`."""
