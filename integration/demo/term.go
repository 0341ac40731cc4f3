package main

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// A term prints lines for a person and counts those that did not hold.
type term struct {
	out            *os.File
	colour         bool
	passed, failed int
}

func newTerm(out *os.File) *term {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return &term{out: out, colour: err == nil && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"}
}

// The colours, as SGR parameters.
const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

func (t *term) paint(sgr, s string) string {
	if !t.colour || s == "" {
		return s
	}
	return "\x1b[" + sgr + "m" + s + "\x1b[0m"
}

func (t *term) title(s string) { fmt.Fprintf(t.out, "\n%s\n", t.paint(bold, s)) }

func (t *term) fact(name, format string, args ...any) {
	fmt.Fprintf(t.out, "  %s %s\n", t.paint(cyan, fmt.Sprintf("%-7s", name)), fmt.Sprintf(format, args...))
}

// check prints one checked line: what was tried, what happened, and what shows
// it. With an error it prints that instead, as a failure.
func (t *term) check(err error, what, happened, shown string) {
	mark := t.paint(green, "✓")
	if err == nil {
		t.passed++
	} else {
		t.failed++
		mark, happened, shown = t.paint(red, "✗"), t.paint(red, err.Error()), ""
	}
	t.line(mark, what, happened, shown)
}

// note prints a line that is shown, not judged.
func (t *term) note(what, happened, shown string) { t.line(t.paint(cyan, "·"), what, happened, shown) }

func (t *term) line(mark, what, happened, shown string) {
	if shown != "" {
		shown = t.paint(dim, "; "+shown)
	}
	fmt.Fprintf(t.out, "%s %-31s %s%s\n", mark, what, happened, shown)
}

func (t *term) summary() {
	if t.failed == 0 {
		fmt.Fprintf(t.out, "\n%s\n", t.paint(green, fmt.Sprintf("All %d lines hold; nothing is left behind.", t.passed)))
		return
	}
	fmt.Fprintf(t.out, "\n%s\n", t.paint(red, fmt.Sprintf("%d of %d lines do not hold.", t.failed, t.passed+t.failed)))
}
