package main

import (
	"cmp"
	"fmt"
	"os"
	"text/tabwriter"
	"time"
)

// A table is printed in columns as Markdown, so that it can stand in a page.
type table struct {
	title string
	rows  [][]string
}

func newTable(title string, head ...string) *table { return &table{title, [][]string{head}} }

func (t *table) row(cells ...string) { t.rows = append(t.rows, cells) }

func (t *table) print() {
	fmt.Printf("\n%s\n\n", t.title)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', 0)
	for i, row := range t.rows {
		for _, cell := range row {
			fmt.Fprintf(w, "| %s\t", cell)
		}
		fmt.Fprintln(w, "|")
		if i == 0 {
			for j := range row {
				fmt.Fprintf(w, "|%s\t", map[bool]string{true: "---", false: "--:"}[j == 0])
			}
			fmt.Fprintln(w, "|")
		}
	}
	w.Flush()
}

func ms(d time.Duration) string { return fmt.Sprintf("%.2f", float64(d.Microseconds())/1000) }

func ratio[T ~int64 | ~float64](a, b T) string { return fmt.Sprintf("%.2f", float64(a)/float64(b)) }

// goals are the figures that were promised.
type goals struct {
	rows [][]string
	peak int64
	met  int
}

func (g *goals) add(what, got, want string, met bool) {
	verdict := "missed"
	if met {
		verdict = "met"
		g.met++
	}
	g.rows = append(g.rows, []string{what, got, want, verdict})
}

func (g *goals) atMost(what string, got, want float64, unit string) {
	g.add(what, fmt.Sprintf("%.4g %s", got, unit), fmt.Sprintf("at most %.4g %s", want, unit), cmp.Compare(got, want) <= 0)
}

func (g *goals) atLeast(what string, got, want float64, unit string) {
	g.add(what, fmt.Sprintf("%.4g %s", got, unit), fmt.Sprintf("at least %.4g %s", want, unit), cmp.Compare(got, want) >= 0)
}

// print says which goals were met. A goal that was missed is printed, not an
// error: a figure on one busy machine proves no defect.
func (g *goals) print(binary string) error {
	info, err := os.Stat(binary)
	if err != nil {
		return err
	}
	g.atMost("size of the binary", float64(info.Size())/(1<<20), 6, "MiB")
	if g.peak > 0 {
		g.atMost("peak memory of an ADD, nft", float64(g.peak)/1e6, 20, "MB")
	}
	t := newTable(fmt.Sprintf("Goals: %d of %d met", g.met, len(g.rows)), "", "measured", "goal", "")
	t.rows = append(t.rows, g.rows...)
	t.print()
	return nil
}
