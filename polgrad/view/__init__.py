"""The viewer: one HTML file that shows a run, or several beside each other, offline.

| module | what it has |
|---|---|
| `runs` | what a run's folder holds, read for the page |
| `charts` | curves of metrics as numbers for SVG |
| `tokens` | rows of tokens with colours and texts |
| `page` | values in the templates, and the files |

The pages have no script, load nothing, and say so to the browser (Content-Security-Policy), so a
completion that contains HTML is text in any case. Colours are chosen by radio buttons and CSS.
"""
