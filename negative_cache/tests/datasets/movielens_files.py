"""Folders in the format of MovieLens 100K, with generated contents."""

import numpy as np

NO_GENRES = "|".join(["0"] * 19)


def movie(identifier, title, date="01-Jan-1995"):
    return f"{identifier}|{title}|{date}||http://us.imdb.com/M/title-exact?{identifier}|{NO_GENRES}"


# The four peculiarities of the real file: no dates and no URL, an accent, a title under two ids,
# an id that is not the number of the line.
UNKNOWN = "267|unknown||||1" + "|0" * 18
MOVIES = [
    movie(1, "Toy Story (1995)"),
    movie(1175, "Misérables, Les (1995)"),
    UNKNOWN,
    movie(246, "Chasing Amy (1997)"),
    movie(268, "Chasing Amy (1997)"),
]
RATINGS = [
    "196\t1\t3\t881250949",
    "7\t1175\t5\t891717742",
    "196\t268\t1\t878887116",
    "22\t267\t4\t880606923",
    "7\t246\t2\t886397596",
]


def write(folder, ratings=RATINGS, movies=MOVIES, line_end="\n", last_line_end=None):
    folder.mkdir(exist_ok=True)
    last_line_end = line_end if last_line_end is None else last_line_end
    for name, lines in (("u.data", ratings), ("u.item", movies)):
        text = line_end.join(lines) + last_line_end
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder


def generate(folder, num_users, num_movies, num_ratings, seed=0):
    """Users of random taste rate movies of random popularity."""
    random = np.random.RandomState(seed)
    popularity = random.dirichlet(np.full(num_movies, 0.5))
    users = random.randint(1, num_users + 1, num_ratings)
    movies = random.choice(num_movies, num_ratings, p=popularity) + 1
    stars = random.randint(1, 6, num_ratings)
    ratings = [
        f"{u}\t{m}\t{s}\t{880000000 + t}" for t, (u, m, s) in enumerate(zip(users, movies, stars))
    ]
    titles = [movie(i, f"Film é {i} (1995)") for i in range(1, num_movies + 1)]
    return write(folder, ratings, titles, line_end="\r\n")
