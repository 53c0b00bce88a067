"""What surrounds a stage: where it stopped and goes on, what it leaves behind, what the terminal shows.

`checkpoint`, `resume`, `readable` and `stages` keep a run whole on disk; `http` and `connections` are what every server
does with strangers; `loop` and `callbacks` join our trainers with
transformers' callbacks; `console`, `report` and `page` show results; `precision`, `distributed`, `functions` and
`trl_arguments` are about the device, the processes, users' own functions and the arguments that trl's trainers take.
"""
