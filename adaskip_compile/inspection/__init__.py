"""What a person sees of graphs and plans: analysis, advice, report and page."""
