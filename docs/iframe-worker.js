/* Search in pages that are opened from a disk. Browsers start no workers from file: addresses, so the theme's search
   script runs in a hidden frame instead, which answers to the same calls: postMessage, onmessage, addEventListener.
   The theme looks for the name IFrameWorker in the page around, and waits for what importScripts returns. */
(function () {
  if (location.protocol !== "file:") return

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.onmessage = null
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      const answer = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      const load = source => new Promise((done, failed) => {
        const script = inside.document.createElement("script")
        Object.assign(script, { src: source, onload: done, onerror: failed })
        inside.document.body.appendChild(script)
      })
      inside.postMessage = answer
      inside.importScripts = (...sources) => sources.reduce((before, next) => before.then(() => load(next)), Promise.resolve())
      this.send = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
      this.ready = load(String(url))
    }

    postMessage(data) { this.ready.then(() => this.send(data)) }
    terminate() {}
  }

  window.IFrameWorker = window.Worker = IFrameWorker
})()
