// Large files as Blobs: from this browser's storage, or from the network into it.

const FOLDER = new URL('.', document.baseURI).href;

// A Cache of this page's own, or null: not offered without https (localhost counts as https), nor by some private modes.
async function storage() {
  try {
    return await caches.open(`whit ${FOLDER}`);
  } catch {
    return null;
  }
}

export class DownloadError extends Error {}

/** Whether every part is in storage. */
export async function isStored(parts) {
  const store = await storage();
  if (!store) return false;
  const found = await Promise.all(parts.map((part) => store.match(part.file)));
  return found.every(Boolean);
}

export async function forget() {
  await globalThis.caches?.delete(`whit ${FOLDER}`);
}

/**
 * The parts, each { file, bytes }, as Blobs. `report(bytes)` is called with what has arrived so far of all of them.
 * Throws DownloadError with a sentence for the visitor, or AbortError when the signal says so.
 */
export async function download(parts, report, signal) {
  const store = await storage();
  const room = store && (await hasRoom(parts));
  const blobs = [];
  let before = 0;
  for (const part of parts) {
    const arrived = (bytes) => report(before + bytes);
    const blob = (await kept(store, part)) ?? (await fetched(part, room ? store : null, arrived, signal));
    if (blob.size !== part.bytes) {
      await store?.delete(part.file);
      throw new DownloadError(
        `${part.file} has ${blob.size} bytes instead of ${part.bytes}. The upload of this page is not complete, or the ` +
          'download broke off. Try again.'
      );
    }
    blobs.push(blob);
    before += part.bytes;
    report(before);
  }
  if (store) await dropOthers(store, parts);
  return blobs;
}

async function kept(store, part) {
  const reply = await store?.match(part.file);
  const blob = await reply?.blob();
  return blob?.size === part.bytes ? blob : null;
}

async function fetched(part, store, arrived, signal) {
  const reply = await request(part, arrived, signal);
  if (!store) return reply.blob();
  try {
    await store.put(part.file, reply);
    return await (await store.match(part.file)).blob();
  } catch (error) {
    if (error.name !== 'QuotaExceededError') throw asDownloadError(error, part);
    return (await request(part, arrived, signal)).blob(); // the disk is full: this visit goes without it
  }
}

async function request(part, arrived, signal) {
  let reply;
  try {
    reply = await fetch(part.file, { signal });
  } catch (error) {
    throw asDownloadError(error, part);
  }
  if (!reply.ok) {
    throw new DownloadError(`${part.file} could not be downloaded: the server answered ${reply.status}.`);
  }
  let bytes = 0;
  const counted = reply.body.pipeThrough(
    new TransformStream({
      transform(chunk, controller) {
        bytes += chunk.byteLength;
        arrived(bytes);
        controller.enqueue(chunk);
      },
    })
  );
  return new Response(counted);
}

function asDownloadError(error, part) {
  if (error.name === 'AbortError' || error instanceof DownloadError) return error;
  return new DownloadError(`${part.file} could not be downloaded. Check the connection and try again.`);
}

async function hasRoom(parts) {
  const { quota, usage } = (await navigator.storage?.estimate?.()) ?? {};
  const wanted = parts.reduce((sum, part) => sum + part.bytes, 0);
  return quota === undefined || quota - usage > wanted;
}

// An earlier version of this page left another model.
async function dropOthers(store, parts) {
  const wanted = new Set(parts.map((part) => new URL(part.file, FOLDER).href));
  for (const request of await store.keys()) {
    if (!wanted.has(request.url)) await store.delete(request);
  }
}
