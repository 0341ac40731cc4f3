package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
)

// maxDepth is above the two levels that a policy has, and low enough that a
// hostile annotation costs nothing.
const maxDepth = 8

// A node is one JSON value; of an object or a list with those inside it, in the
// order they were written.
type node struct {
	kind  byte   // '{', '[', '"', '0', 't' (either boolean) or 'n' (null)
	name  string // of a member of an object
	value string // of a string what it says, else as written
	kids  []node
}

// text is the value as written, shortened, for errors.
func (n *node) text() string {
	if n.kind == '"' {
		return short(strconv.Quote(n.value))
	}
	return short(n.value)
}

// parseJSON reads exactly one JSON value.
func parseJSON(text string) (node, error) {
	if !json.Valid([]byte(text)) {
		return node{}, whyInvalid(text)
	}
	r := reader{text: text}
	return r.value(0)
}

func whyInvalid(text string) error {
	d := json.NewDecoder(strings.NewReader(text))
	var whole json.RawMessage
	err := d.Decode(&whole)
	switch {
	case err == nil:
		return fmt.Errorf("a second value follows: %s", short(strings.Trim(text[d.InputOffset():], " \t\r\n")))
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return errors.New("it ends too early")
	}
	return err
}

// A reader takes apart JSON that is known to be sound, without copying it:
// json.Decoder.Token takes ten times as long.
type reader struct {
	text string
	at   int
}

// peek returns the next byte that means something.
func (r *reader) peek() byte {
	for strings.IndexByte(" \t\r\n,:", r.text[r.at]) >= 0 {
		r.at++
	}
	return r.text[r.at]
}

func (r *reader) value(depth int) (n node, err error) {
	if depth > maxDepth {
		return node{}, errors.New("nested too deeply")
	}
	n.kind = r.peek()
	start := r.at
	switch n.kind {
	case '"':
		n.value, err = r.str()
		return n, err
	case '{', '[':
		if list, _, flat := strings.Cut(r.text[r.at:], "]"); flat && n.kind == '[' {
			n.kids = make([]node, 0, 1+strings.Count(list, ","))
		}
		for r.at++; r.peek() != n.kind+2; { // '{'+2 is '}', '['+2 is ']'
			var name string
			if n.kind == '{' {
				if name, err = r.str(); err != nil {
					return node{}, err
				}
			}
			kid, err := r.value(depth + 1)
			if err != nil {
				return node{}, err
			}
			kid.name = name
			n.kids = append(n.kids, kid)
		}
		r.at++
	default: // a number, true, false or null
		for r.at < len(r.text) && strings.IndexByte(" \t\r\n,]}", r.text[r.at]) < 0 {
			r.at++
		}
		switch n.kind {
		case 't', 'f':
			n.kind = 't'
		case 'n':
		default:
			n.kind = '0'
		}
	}
	n.value = r.text[start:r.at]
	return n, nil
}

// str reads a string; only one with an escape has to be copied.
func (r *reader) str() (string, error) {
	start := r.at
	plain := true
	for r.at++; r.text[r.at] != '"'; r.at++ {
		if r.text[r.at] == '\\' {
			plain = false
			r.at++
		}
	}
	r.at++
	if plain {
		return r.text[start+1 : r.at-1], nil
	}
	var s string
	err := json.Unmarshal([]byte(r.text[start:r.at]), &s)
	return s, err
}

// short keeps what users wrote readable in an event: 80 bytes at most, on one line.
func short(s string) string {
	const most = 80
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "…"
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
}
