"""Human data: one file that holds what is to be judged, who judged it and how, and the doors to it.

`store` is the SQLite file and the one door for other rooms; `records` are its rows, `schema` has its tables, `content`
reads and writes items and judgments. `assign` decides who gets which item, `personal` keeps what people said in the
playground and erases it. People, grader models and simulated labelers judge through the same `desk`. `agreement` is
the mathematics, `measured` applies it to a store, `report` is its page, `choose` says what to label next; `export`
and `imported` are the ways out and in. `app` serves the labelling `page` and an API whose client is `http_desk`;
`project` says what annotators are asked, `incoming` and `sample` bring what they judge, and `review` brings flagged
conversations and measures the classifier by what people decide about them.
"""
