def plot_if_possible(result, path):
    return "no plot"
