// Program tally reads the output of `go test -json` and prints what a person
// wants of it: each package's line, the output of what failed, and how many
// tests passed. A package that fails without one of its tests failing, or that
// cannot be built, counts as one that failed. It exits 1 when anything failed,
// when a test was skipped (a test that no machine here can run is a failure),
// or when there was none.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
)

func main() { os.Exit(tally(os.Stdin, os.Stdout)) }

// A line is what go test says of one event; see `go doc test2json`.
type line struct{ Action, Package, Test, Output, ImportPath string }

func tally(in io.Reader, out io.Writer) int {
	c := counter{out: out, said: map[string][]string{}, blamed: map[string]bool{}}
	for r := bufio.NewReader(in); ; {
		text, err := r.ReadString('\n')
		var l line
		switch {
		case text == "":
		case json.Unmarshal([]byte(text), &l) != nil:
			fmt.Fprint(out, text) // not of test2json: a message of the go command
		default:
			c.count(l)
		}
		if err != nil {
			break
		}
	}
	fmt.Fprintf(out, "%d passed, %d failed", c.passed, c.failed)
	if c.skipped > 0 {
		fmt.Fprintf(out, ", %d skipped", c.skipped)
	}
	fmt.Fprintln(out)
	if c.failed > 0 || c.skipped > 0 || c.passed == 0 {
		return 1
	}
	return 0
}

type counter struct {
	out                     io.Writer
	passed, failed, skipped int
	said                    map[string][]string // by package and test
	blamed                  map[string]bool     // packages of which a test failed
}

func (c *counter) count(l line) {
	key := l.Package + " " + l.Test
	switch l.Action {
	case "build-output":
		fmt.Fprint(c.out, l.Output)
		return
	case "output":
		switch {
		case l.Test != "" || !isSummary(l.Output):
			c.said[key] = append(c.said[key], l.Output)
		case !strings.HasPrefix(l.Output, "?"): // a package without tests
			fmt.Fprint(c.out, l.Output)
		}
		return
	case "pass":
		if l.Test != "" {
			c.passed++
		}
	case "fail":
		if l.Test != "" || !c.blamed[l.Package] {
			c.failed++
			c.blamed[l.Package] = true
			fmt.Fprint(c.out, strings.Join(c.said[key], ""))
		}
	case "skip":
		if l.Test != "" {
			c.skipped++
			fmt.Fprint(c.out, strings.Join(c.said[key], ""))
		}
	default:
		return
	}
	delete(c.said, key)
}

// isSummary tells the closing line of a package from what it printed before.
func isSummary(s string) bool {
	for _, start := range []string{"ok  \t", "FAIL\t", "?   \t", "---", "\t"} {
		if strings.HasPrefix(s, start) {
			return true
		}
	}
	return false
}
