// llama.cpp in a worker: loading a model, and the pieces of an answer. No part of the page is touched here.

import { Wllama } from './wllama.js';

const MIB = 2 ** 20;
const LARGEST_COMPAT = 2048 * MIB; // offsets in a file have 31 bits there

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

export class Model {
  #runtime;
  #chat;

  constructor(runtime, chat) {
    this.#runtime = runtime;
    this.#chat = chat;
  }

  /** Load a Blob with a GGUF file. `page` holds `context` (tokens) and `chat` (whether there is a template). */
  static async load(page, blob) {
    const compat = !('Suspending' in WebAssembly) && !/Firefox\//.test(navigator.userAgent);
    if (compat && blob.size > LARGEST_COMPAT) {
      throw new ModelError('This browser runs models of up to 2.1 GB. Try a recent version of Chrome, Edge or Firefox.');
    }
    const complaints = [];
    const note = (...words) => complaints.push(words.join(' '));
    const logger = { debug() {}, log() {}, warn: note, error: note };
    // The page downloads by itself; wllama's own stores are not asked for, and may not exist.
    const runtime = new Wllama({ default: 'wllama.wasm' }, { logger, cacheManager: {}, modelManager: {} });
    runtime.setCompat({ worker: 'compat.js', wasm: 'compat.wasm' }); // its default lies on another server
    try {
      await runtime.loadModel([blob], {
        n_ctx: page.context,
        n_threads: threads(),
        n_parallel: 1,
        n_gpu_layers: 0,
        jinja: true,
        reasoning_format: 'none',
      });
    } catch (error) {
      await runtime.exit();
      throw new ModelError(whyNotLoaded(error, complaints));
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
  return `The model could not be started: ${said.split('\n').findLast((line) => line.trim()) ?? 'no reason was given'}`;
}

function whyNoAnswer(error) {
  const said = error?.message ?? String(error);
  if (/context/i.test(said)) return 'The conversation has become longer than the model can read. Begin a new one.';
  if (/memory|unreachable|abort/i.test(said)) {
    return 'The model ran out of memory and has stopped. Load this page again.';
  }
  return `The model could not answer: ${said}`;
}
