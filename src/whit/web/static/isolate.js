// Threads need shared memory, which a browser gives only to pages with two headers. Where a host does not send them,
// a service worker (headers.js) adds them, and the page loads once more. Without it one thread does the work.

const TRIED = 'whit-isolation-tried';

/** True when the page is about to load again. */
export async function isolate() {
  if (globalThis.crossOriginIsolated || !globalThis.isSecureContext || !navigator.serviceWorker) return false;
  if (window.top !== window) return false; // a frame gets what its outer page has
  try {
    if (sessionStorage.getItem(TRIED)) return false;
    sessionStorage.setItem(TRIED, '1');
    await navigator.serviceWorker.register('headers.js');
    await navigator.serviceWorker.ready;
  } catch {
    return false; // storage or service workers are switched off
  }
  location.reload();
  return true;
}
