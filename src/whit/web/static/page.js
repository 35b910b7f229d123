// The page: what is shown when, and what the buttons do.

import { DownloadError, download, forget, isStored } from './download.js';
import { isolate } from './isolate.js';
import { Model, ModelError, build } from './model.js';

const at = (id) => document.getElementById(id);
const show = (...ids) => {
  for (const id of ['start', 'loading', 'log', 'ask']) at(id).hidden = !ids.includes(id);
};

const CUT_OFF = 'The answer was cut off: it has reached the longest length, or the context is full.';

let page; // page.json
let parts; // what this browser needs: a build of llama.cpp, and the model
let model = null;
let stopping = null; // the AbortController of what is going on
let messages = [];

async function start() {
  at('not-started').hidden = true;
  if (await isolate()) return;
  page = await facts();
  parts = [page.runtime[build()], ...page.parts];
  if (await isStored(parts)) await load();
  else show('start');
}

async function facts() {
  try {
    const reply = await fetch('page.json');
    if (reply.ok) return await reply.json();
  } catch {
    // said below
  }
  throw new DownloadError('page.json could not be downloaded. Check the connection, and that all files were uploaded.');
}

async function load() {
  at('error').hidden = true;
  show('loading');
  stopping = new AbortController();
  at('cancel').hidden = false;
  say('Loading the model.');
  at('cancel').focus();
  try {
    const [wasm, ...pieces] = await download(parts, showProgress, stopping.signal);
    at('cancel').hidden = true;
    at('progress-label').textContent = 'Starting the model';
    at('progress').removeAttribute('value');
    model = await Model.load(page, wasm, new Blob(pieces));
  } catch (error) {
    show('start');
    at('load').focus();
    if (error.name !== 'AbortError') complain(error);
    return;
  } finally {
    stopping = null;
  }
  at('about-runtime').textContent = `Runs on ${model.threads === 1 ? '1 thread' : `${model.threads} threads`}.`;
  show('log', 'ask');
  at('log').hidden = true;
  say('The model is ready.');
  at('prompt').focus();
}

function showProgress(bytes) {
  const all = parts.reduce((sum, part) => sum + part.bytes, 0);
  at('progress').value = bytes / all;
  at('progress-label').textContent = `Loading the model: ${(bytes / 1e6).toFixed(0)} of ${(all / 1e6).toFixed(0)} MB`;
}

async function ask(event) {
  event?.preventDefault();
  const text = at('prompt').value;
  if (!text.trim() || stopping) return;
  at('error').hidden = true;
  stopping = new AbortController();
  const asked = [...(page.chat ? messages : []), { role: 'user', content: text }];
  at('prompt').value = '';
  const question = entry('question', page.chat ? 'You' : 'Text', text);
  const reply = entry('answer', page.chat ? 'Model' : 'Goes on', '');
  answering(true);
  say(page.chat ? 'The model is reading your message.' : 'The model is reading the text.');
  let answer = '';
  let end = '';
  let complete = false;
  try {
    for await (const piece of model.answer(asked, settings(stopping.signal))) {
      answer += piece.text;
      reply.text.textContent = answer;
      if (piece.speed) at('speed').textContent = `${piece.speed.toFixed(1)} tokens per second`;
      if (piece.ended === 'length') end = CUT_OFF;
      if (answer) say('');
      follow();
    }
    complete = true;
  } catch (error) {
    if (error.name === 'AbortError') end = 'Stopped.';
    else complain(error);
  }
  if (complete && !answer.trim()) end = 'The model has ended its answer without a word.';
  if (complete || answer) {
    messages = [...asked, { role: 'assistant', content: answer }];
  } else {
    question.box.remove();
    reply.box.remove();
    at('prompt').value = text; // to be changed and sent again
  }
  reply.box.setAttribute('aria-busy', 'false');
  answering(false);
  say(end);
}

function settings(signal) {
  const number = (id, least, most, otherwise) => {
    const value = at(id).valueAsNumber;
    return Number.isFinite(value) ? Math.min(most, Math.max(least, value)) : otherwise;
  };
  return {
    temperature: number('temperature', 0, 2, 0),
    tokens: Math.round(number('tokens', 1, page.context, Math.min(512, page.context))),
    signal,
  };
}

// A screen reader hears an answer when it is complete: until then its entry is busy.
function entry(kind, who, content) {
  const box = document.createElement('div');
  box.className = `entry ${kind}`;
  box.setAttribute('aria-busy', String(kind === 'answer'));
  const name = document.createElement('p');
  name.className = 'who';
  name.textContent = who;
  const text = document.createElement('p');
  text.className = 'text';
  text.textContent = content;
  box.append(name, text);
  at('log').append(box);
  at('log').hidden = false;
  follow();
  return { box, text };
}

function follow() {
  at('log').scrollTop = at('log').scrollHeight;
}

function answering(now) {
  at('send').hidden = now;
  at('stop').hidden = !now;
  at('reset').disabled = at('forget').disabled = now;
  if (now) at('stop').focus();
  else {
    stopping = null;
    at('prompt').focus();
  }
}

function reset() {
  messages = [];
  at('log').replaceChildren();
  at('log').hidden = true;
  at('error').hidden = true;
  at('speed').textContent = '';
  say('');
  at('prompt').focus();
}

async function remove() {
  await forget();
  say('The model is no longer kept in this browser. It stays loaded until this page is closed.');
}

function say(text) {
  at('status').textContent = text;
}

function complain(error) {
  const known = error instanceof DownloadError || error instanceof ModelError;
  at('error').textContent = known ? error.message : `Something went wrong: ${error?.message ?? error}`;
  at('error').hidden = false;
  say('');
}

at('load').addEventListener('click', load);
at('cancel').addEventListener('click', () => stopping?.abort());
at('ask').addEventListener('submit', ask);
at('stop').addEventListener('click', () => stopping?.abort());
at('reset').addEventListener('click', reset);
at('forget').addEventListener('click', remove);
at('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) ask(event);
});
document.addEventListener('keydown', (event) => {
  if (event.key === 'Escape') stopping?.abort();
});

start().catch(complain);
