"""Makes what a soak needs on the disk: a tiny base, versions of customers, keys, and what each version answers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.common.serving import save_base
from benchmarks.server_soak.place import CUSTOMERS, NEVER, TEXTS, VERSIONS, Place, name_of
from exporters.onnx import export_switchable
from exporters.onnx.options import OnnxOptions
from exporters.onnx.synthetic_customers import base_customer
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.data.sample import sample_texts
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.runtime import Predictor, SwitchableSession, open_bundle
from qrlora_deploy.serving.keys_file import empty_keys, with_key, write_keys

RANK = 16


def make(folder: Path) -> Place:
    """Make a place."""
    place = Place(folder)
    base = _export(folder)
    random = np.random.default_rng(0)
    (folder / "versions").mkdir()
    place.customers.mkdir()
    for customer in range(CUSTOMERS):
        for number in range(VERSIONS):
            values = random.normal(0, 2, len(base.values)).astype(np.float32)
            write_coefficients(replace(base, values=values), place.version(customer, number))
        shutil.copy(place.version(customer, 0), place.customers / f"{name_of(customer)}.safetensors")
    np.full((CUSTOMERS, VERSIONS), NEVER).tofile(folder / "replaced")
    place.replaced_s()[:, 0] = 0
    _answer_all(place, _make_keys(place))
    return place


def _export(folder: Path) -> Coefficients:
    checkpoint = open_checkpoint(str(save_base(folder / "base", "tiny")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton(), ["query"], 2), FixedRank(RANK))
    texts = Examples(sample_texts()[:8], None, ["0"] * 8, "samples")
    export_switchable(ExportJob(checkpoint, basis, folder / "bundle"), OnnxOptions(data=texts))
    return base_customer(checkpoint, basis)


def _make_keys(place: Place) -> list[str]:
    file, keys = empty_keys(), []
    for customers in [*([name_of(customer)] for customer in range(CUSTOMERS)), ["*"]]:
        file, _, key = with_key(file, customers, [])
        keys.append(key)
    write_keys(file, place.keys)
    return keys


def _answer_all(place: Place, keys: list[str]) -> None:
    """Note what the session answers, each row alone."""
    session = SwitchableSession(open_bundle(place.folder / "bundle"), threads=1)
    predictor, texts, digests = Predictor(session), sample_texts()[:TEXTS], []
    logits = np.empty((CUSTOMERS + 1, VERSIONS, TEXTS, len(session.manifest.labels)), np.float32)
    scores = np.empty(logits.shape[:-1], np.float32)
    for customer in range(CUSTOMERS + 1):
        for number in range(VERSIONS):
            owner = None
            if customer < CUSTOMERS:
                owner, file = name_of(customer), place.version(customer, number)
                session.load(owner, file)
                digests.append((read_coefficients(file).digest, customer, number))
            found = predictor.predict(texts, batch_size=1, customers=[owner] * len(texts))
            logits[customer, number] = [answer.logits for answer in found]
            scores[customer, number] = [answer.score for answer in found]
    np.savez(place.folder / "known.npz", logits=logits, scores=scores)
    record = {"texts": texts, "versions": digests, "labels": session.manifest.labels, "keys": keys}
    (place.folder / "known.json").write_text(json.dumps(record))
