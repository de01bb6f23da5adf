// What stands at the axes of a chart.

const FEWEST_DIGITS = 2;
const MOST_DIGITS = 6;

// Whole steps from the first to the last, at most four, each once.
export function stepTicks(first, last) {
  const ticks = [0, 1, 2, 3].map((i) => Math.round(first + (i / 3) * (last - first)));
  return [...new Set(ticks)];
}

// Numbers in as few digits as tell them apart.
export function labels(values) {
  for (let digits = FEWEST_DIGITS; ; digits++) {
    const texts = values.map((value) => value.toPrecision(digits));
    if (digits === MOST_DIGITS || new Set(texts).size === values.length) return texts;
  }
}
