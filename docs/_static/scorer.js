// Sphinx's default scores, but how-to pages come first: a reader who searches has a job to do.
var Scorer = {
  score: ([name, , , , score]) => score + (name.startsWith("docs/howto/") ? 25 : 0),
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
