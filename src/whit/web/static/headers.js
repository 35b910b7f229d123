// A service worker that adds the headers of cross-origin isolation to the page itself; see isolate.js.

self.addEventListener('install', () => self.skipWaiting());

self.addEventListener('fetch', (event) => {
  if (event.request.mode === 'navigate') event.respondWith(isolated(event.request));
});

async function isolated(request) {
  const reply = await fetch(request);
  if (!reply.status) return reply; // a redirection, which the browser follows by itself
  const headers = new Headers(reply.headers);
  headers.set('Cross-Origin-Opener-Policy', 'same-origin');
  headers.set('Cross-Origin-Embedder-Policy', 'require-corp');
  return new Response(reply.body, { status: reply.status, statusText: reply.statusText, headers });
}
