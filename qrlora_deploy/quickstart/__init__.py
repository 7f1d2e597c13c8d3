"""The whole way from a pretrained encoder to an ONNX bundle, on a model and data that come by pip."""

from qrlora_deploy.installation.parts import need

need("train", __name__, ["torch"])
