// Greedy tokens and likelihoods by llama.cpp itself, which the npm package node-llama-cpp brings built:
// node llama_cpp.mjs GGUF ASKED.json OUT.json [ADAPTER], in a folder of npm that has node-llama-cpp.
//
// ASKED.json holds the ids of each prompt, the number of tokens to write behind them, and windows of tokens of which the
// logarithms of the likelihoods are wanted, all but the first's; see elsewhere.py. Text is split by the GGUF file's own
// tokenizer where ASKED.json has texts, and its ids are put beside.

import {createRequire} from "node:module";
import {readFileSync, writeFileSync} from "node:fs";
import {join} from "node:path";
import {pathToFileURL} from "node:url";

const installed = createRequire(join(process.cwd(), "package.json")).resolve("node-llama-cpp");
const {getLlama} = await import(pathToFileURL(installed));
const [file, asked, out, adapter] = process.argv.slice(2);
const {prompts, tokens: count, windows, texts = []} = JSON.parse(readFileSync(asked, "utf-8"));

const llama = await getLlama({gpu: false, build: "never", maxThreads: 1, skipDownload: true});
const model = await llama.loadModel({modelPath: file});
const lora = adapter ? {adapters: [{filePath: adapter, scale: 1}]} : undefined;
const context = await model.createContext({contextSize: 512, threads: 1, flashAttention: false, lora});
const sequence = context.getSequence();

async function written(prompt) {
    await sequence.clearHistory();
    const found = [];
    let next = prompt;
    while (found.length < count) {
        const logits = {filter: {tokens: [], includeTop: 2}};
        const asks = next.map((token, i) => (i < next.length - 1 ? token : [token, {generateNext: {logits}}]));
        const best = [...(await sequence.controlledEvaluate(asks)).at(-1).next.logits];
        best.sort((one, other) => other[1] - one[1]);
        next = [best.find(([token]) => !model.isEogToken(token))[0]];  // an end of the text is not written
        found.push(next[0]);
    }
    return found;
}

async function likelihoods(window) {
    await sequence.clearHistory();
    const found = [];
    const asks = window.map((token, i) => (i < window.length - 1 ? [token, {generateNext: {logits: true}}] : token));
    await sequence.controlledEvaluate(asks, {
        onTokenResult: (i, {next: {logits}}) => {
            const largest = [...logits.values()].reduce((one, other) => Math.max(one, other));
            let sum = 0;
            for (const logit of logits.values()) sum += Math.exp(logit - largest);
            found[i] = logits.get(window[i + 1]) - largest - Math.log(sum);
        }
    });
    return found;
}

const all = async (each, of) => {
    const found = [];
    for (const one of of) found.push(await each(one));
    return found;
};
const answer = {
    tokens: await all(written, prompts),
    likelihoods: await all(likelihoods, windows),
    ids: texts.map((text) => model.tokenize(text, true)),
    release: llama.llamaCppRelease
};
writeFileSync(out, JSON.stringify(answer));
process.exit(0);
