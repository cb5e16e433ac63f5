"""What is asked of a page in a browser, in JavaScript: each gives a list that should be empty."""

# Everything that sticks out of the page on the right, but what lies in a box that scrolls by itself.
STICKING_OUT = """
[...document.querySelectorAll("body *")]
  .filter(e => !e.parentElement.closest(".scroll"))
  .filter(e => e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
  .map(e => e.tagName + "." + (e.getAttribute("class") || "") + ": " + e.textContent.slice(0, 40))
"""
# Texts of one chart that lie on one another.
COLLISIONS = """
[...document.querySelectorAll("svg.chart")].flatMap(chart => {
  const boxes = [...chart.querySelectorAll("text")].map(t => [t.textContent, t.getBoundingClientRect()]);
  return boxes.flatMap(([one, a], n) => boxes.slice(n + 1)
    .filter(([_, b]) => a.width && b.width && a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2
                        && b.top + 2 < a.bottom - 2)
    .map(([other]) => one + " | " + other));
})
"""
CONTRAST = """
(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
  const luminance = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map(c => c / 255)
      .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") return colour;
    }
  };
  return [...document.querySelectorAll("p, li, td, th, h1, h2, h3, dt, dd, summary, code, small, strong, svg text")]
    .filter(e => e.textContent.trim() && e.getClientRects().length)
    .map(e => {
      const style = getComputedStyle(e);
      const [a, b] = [e instanceof SVGElement ? style.fill : style.color, behind(e)].map(luminance);
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ": " + e.textContent.trim().slice(0, 30)];
    })
    .filter(([ratio]) => ratio < 4.5);
})()
"""
