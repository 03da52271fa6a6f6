"""Rating by hand: a person puts a prompt's images in order on a web page, and the run learns from the order.

reward.py       the reward `human`: hands a round's images to the session and waits for their ranks
image_files.py  the images on the disk, which a restart finds again
session.py      what is asked, what was answered, undo; records.py keeps it in a file
suited.py       what `rlcm-fast rate` changes in the config of another run
win_rate.py     how often the tuned model wins against the start
server.py       the page on the loopback interface; page/ has its HTML, CSS and JavaScript
ranks.py        ranks -> scores in [-1, 1]
preference.py   the Plackett-Luce head that the reward `ratings` (learned.py) trains on recorded ratings
"""
