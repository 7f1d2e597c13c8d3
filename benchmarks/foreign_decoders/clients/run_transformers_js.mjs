// transformers.js on Node: `node run_transformers_js.mjs FOLDER`, in a folder with @huggingface/transformers.
// The graphs are those of --format genai; customers of "rows" are two more inputs.
import fs from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(path.join(process.cwd(), "package.json"));
const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import(
  pathToFileURL(require.resolve("@huggingface/transformers")).href
);
const folder = path.resolve(process.argv[2]);
const expected = JSON.parse(fs.readFileSync(path.join(folder, "expected.json"), "utf8"));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = folder;
const results = {};

function note(what, problem) {
  (results[what] ??= []).push(problem);
}

function compare(what, name, prompt, tokens) {
  const { tokens: all, sure } = expected.answers[name][prompt];
  const ends = all.map((token, place) => (expected.ends.includes(token) ? place + 1 : sure));
  const count = Math.min(sure, ...ends);
  const [found, right] = [tokens.slice(0, count).join(" "), all.slice(0, count).join(" ")];
  note(what, found === right ? "" : `${name}, prompt ${prompt}: ${found} and not ${right}`);
}

// One batch, padded on the left as transformers.js does it; greedy tokens of each row.
async function answer(model, prompts, further = {}) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const padded = prompts.map((prompt) => Array(longest - prompt.length).fill(expected.padding).concat(prompt));
  const mask = prompts.map((prompt) => Array(longest - prompt.length).fill(0).concat(Array(prompt.length).fill(1)));
  const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat().map(BigInt)), [rows.length, longest]);
  const found = await model.generate({
    input_ids: tensor(padded),
    attention_mask: tensor(mask),
    max_new_tokens: expected.steps,
    do_sample: false,
    ...further,
  });
  return found.tolist().map((row) => row.slice(longest).map(Number));
}

const options = { dtype: "fp32", device: "cpu" };

const merged = await AutoModelForCausalLM.from_pretrained("merged", options);
(await answer(merged, expected.prompts)).forEach((tokens, prompt) => compare("merged", "acme", prompt, tokens));

const base = await AutoModelForCausalLM.from_pretrained("drop-in", options);
(await answer(base, expected.prompts)).forEach((tokens, prompt) => compare("drop-in: the base", "base", prompt, tokens));

const rows = await AutoModelForCausalLM.from_pretrained("rows", options);
// Inputs that transformers.js does not know are handed on only once they are named.
rows.forward_params.push("coefficient_table", "slot");
const table = expected.table;
const pairs = expected.names.flatMap((name, slot) => expected.prompts.map((_, prompt) => [name, slot, prompt]));
const customers = {
  coefficient_table: new Tensor("float32", Float32Array.from(table.flat()), [table.length, table[0].length]),
  slot: new Tensor("int64", BigInt64Array.from(pairs.map(([, slot]) => BigInt(slot))), [pairs.length]),
};
const found = await answer(rows, pairs.map(([, , prompt]) => expected.prompts[prompt]), customers);
pairs.forEach(([name, , prompt], row) => compare("rows: a customer in each row", name, prompt, found[row]));

const tokenizer = await AutoTokenizer.from_pretrained("rows");
expected.texts.forEach((text, prompt) => {
  const same = tokenizer.encode(text).join(" ") === expected.prompts[prompt].join(" ");
  note("the tokenizer", same ? "" : `${text} has other tokens`);
});

const versions = { node: process.versions.node };
for (const name of ["@huggingface/transformers", "onnxruntime-node"]) {
  const place = path.join(process.cwd(), "node_modules", name, "package.json");
  versions[name] = JSON.parse(fs.readFileSync(place, "utf8")).version;
}
const report = Object.entries(results).map(([what, lines]) => {
  const wrong = lines.filter((line) => line);
  return { what, equal: lines.length - wrong.length, of: lines.length, wrong };
});
console.log(JSON.stringify({ versions, results: report }));
process.exit(report.some(({ wrong }) => wrong.length) ? 1 : 0);
