// llama.cpp in a worker: loading a model, and the pieces of an answer. No part of the page is touched here.

import { Wllama } from './wllama.js';

const LARGEST_COMPAT = 2 ** 31; // bytes: offsets in a file have 31 bits there

/** Thrown with a sentence for the visitor. */
export class ModelError extends Error {}

/**
 * Threads to work with: half of what the device offers, and 8 at most, since they wait for each other after every product
 * and one that comes late (a core with two threads, a slow core, another program) holds up all. One where the browser
 * gives the page no shared memory.
 */
function threads() {
  const offered = navigator.hardwareConcurrency || 1;
  return globalThis.crossOriginIsolated ? Math.min(8, Math.max(1, Math.floor(offered / 2))) : 1;
}

/** Which build of llama.cpp this browser needs, by wllama's own judgement: 'usual', or 'compat' (Safari). */
export function build() {
  return made('', {}).getWorkerResources().compat ? 'compat' : 'usual';
}

function made(wasm, logger) {
  const quiet = { debug() {}, log() {}, warn() {}, error() {}, ...logger };
  // The page downloads by itself; wllama's own stores are not asked for, and may not exist.
  const runtime = new Wllama({ default: wasm || 'none' }, { logger: quiet, cacheManager: {}, modelManager: {} });
  runtime.setCompat({ worker: 'compat.js', wasm }); // its default lies on another server
  return runtime;
}

export class Model {
  #runtime;
  #chat;

  constructor(runtime, chat) {
    this.#runtime = runtime;
    this.#chat = chat;
  }

  /**
   * Load a GGUF file with a build of llama.cpp, both of them Blobs: an address that fails would leave the worker waiting
   * for ever. `page` holds `context` (tokens) and `chat` (whether there is a template). Throws ModelError.
   */
  static async load(page, wasm, blob) {
    if (build() === 'compat' && blob.size > LARGEST_COMPAT) {
      throw new ModelError('This browser runs models of up to 2.1 GB. Try a recent version of Chrome, Edge or Firefox.');
    }
    const complaints = [];
    const note = (...words) => complaints.push(words.join(' '));
    const address = URL.createObjectURL(new Blob([wasm], { type: 'application/wasm' }));
    const runtime = made(address, { error: note });
    try {
      await runtime.loadModel([blob], {
        n_ctx: page.context,
        n_threads: threads(),
        n_parallel: 1,
        n_gpu_layers: 0,
        jinja: true,
        reasoning_format: 'none',
      });
      if (!runtime.getLoadedContextInfo().success) throw new Error('llama.cpp refuses the file'); // wllama says nothing
    } catch (error) {
      await runtime.exit();
      throw new ModelError(whyNotLoaded(error, complaints));
    } finally {
      URL.revokeObjectURL(address);
    }
    return new Model(runtime, page.chat);
  }

  get threads() {
    return this.#runtime.getNumThreads();
  }

  /**
   * Pieces of an answer: { text, speed (tokens per second), tokens, ended ('stop', 'length' or null) }.
   * `messages` is a conversation, or for a model without a template one message with the text to go on with.
   */
  async *answer(messages, { tokens, temperature, signal }) {
    const options = { stream: true, max_tokens: tokens, temperature, timings_per_token: true, abortSignal: signal };
    try {
      const pieces = this.#chat
        ? await this.#runtime.createChatCompletion({ ...options, messages })
        : await this.#runtime.createCompletion({ ...options, prompt: messages[0].content });
      for await (const piece of pieces) {
        const choice = piece.choices?.[0];
        yield {
          text: (this.#chat ? choice?.delta?.content : choice?.text) ?? '',
          speed: piece.timings?.predicted_per_second ?? null,
          tokens: piece.timings?.predicted_n ?? null,
          ended: choice?.finish_reason ?? null,
        };
      }
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ModelError(whyNoAnswer(error));
    }
  }
}

function whyNotLoaded(error, complaints) {
  const said = [error?.message ?? String(error), ...complaints].join('\n');
  if (/memory|allocat|OOM/i.test(said)) {
    return 'This device or browser has too little memory for the model. Close other tabs, or try another device.';
  }
  if (/exception handling|SIMD|version_mismatch|CompileError/i.test(said)) {
    return 'This browser is too old to run the model. Try a recent version of Chrome, Edge, Firefox or Safari.';
  }
  const first = complaints.find((line) => line.trim()) ?? error?.message ?? 'no reason was given';
  return `The model could not be started. llama.cpp says: ${first}`;
}

function whyNoAnswer(error) {
  const said = error?.message ?? String(error);
  if (/context/i.test(said)) return 'The conversation has become longer than the model can read. Begin a new one.';
  if (/memory|unreachable|abort/i.test(said)) {
    return 'The model ran out of memory and has stopped. Load this page again.';
  }
  return `The model could not answer: ${said}`;
}
