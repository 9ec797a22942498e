// Sphinx's default scores, but among pages that match alike a how-to page comes first: a reader who searches has a job
// to do. A word in a heading (15) still outweighs one in the text of a how-to page (5).
const MORE = [
  [/^docs\/howto\/(?!index)/, 8],
  [/^docs\/concepts\/(?!index)/, 4],
  [/\/index$|^studies\/|^CHANGELOG$/, -4],
];
var Scorer = {
  score: ([name, , , , score]) => MORE.reduce((sum, [names, more]) => sum + (names.test(name) ? more : 0), score),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
