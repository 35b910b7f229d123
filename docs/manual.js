/* What the theme leaves out for people who use a keyboard or a screen reader: blocks and tables that scroll can be
   reached by the tab key, and the search dialog and the buttons beside code have names. The theme builds some of these
   after the page has come, so it is done again when the page changes. */
(function () {
  const mend = () => {
    for (const each of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
      if (each.scrollWidth > each.clientWidth) each.tabIndex = 0
      else each.removeAttribute("tabindex")
    }
    document.querySelector(".md-search")?.setAttribute("aria-label", "Search")
    document.querySelectorAll(".md-code__nav").forEach((each, i) => each.setAttribute("aria-label", `Code ${i + 1}`))
  }
  let waiting = 0
  const soon = () => {
    cancelAnimationFrame(waiting)
    waiting = requestAnimationFrame(mend)
  }
  new MutationObserver(soon).observe(document.documentElement, { childList: true, subtree: true })
  addEventListener("resize", soon)
  soon()
})()
