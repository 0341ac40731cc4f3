package redirect_test

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

var update = flag.Bool("update", false, "write the golden files of testdata from what the code does")

// podAddrs are the own addresses of the pod that every decisions.txt speaks of.
var podAddrs = []netip.Addr{netip.MustParseAddr("10.1.0.5"), netip.MustParseAddr("fd00:1::5")}

// TestGolden compiles testdata/NAME/policy.json and compares the rules with
// rules.txt, and the fate of each connection that decisions.txt lists with the
// sentence under it. With -update it writes the rules and the sentences anew.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*/policy.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no policies in testdata: %v", err)
	}
	for _, file := range files {
		dir := filepath.Dir(file)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			rules := parseFile(t, file).Rules()
			compareGolden(t, filepath.Join(dir, "rules.txt"), redirect.Print(rules))
			name := filepath.Join(dir, "decisions.txt")
			compareGolden(t, name, decide(t, rules, readFile(t, name)))
		})
	}
}

func parseFile(t *testing.T, file string) *redirect.Policy {
	t.Helper()
	p, err := redirect.Parse(readFile(t, file))
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return p
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func compareGolden(t *testing.T, name, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if want := readFile(t, name); got != want {
		t.Errorf("%s differs; look at it, then run go test -update.\ngot:\n%s\nwant:\n%s", name, got, want)
	}
}

// decide reads a list of connections, a line each, and puts under each the
// sentence that tells its fate. Indented lines are the sentences of an earlier
// run; lines that start with # and empty ones are kept.
func decide(t *testing.T, rules []redirect.Rule, list string) string {
	t.Helper()
	var out strings.Builder
	for line := range strings.Lines(list) {
		line = strings.TrimRight(line, "\n")
		if strings.HasPrefix(line, " ") {
			continue
		}
		fmt.Fprintln(&out, line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		c, err := parseConn(line)
		if err != nil {
			t.Fatalf("connection %q: %v", line, err)
		}
		fmt.Fprintf(&out, "    %s\n", redirect.Decide(rules, c))
	}
	return out.String()
}

// parseConn reads one of
//
//	inside tcp 10.1.0.5:40000 -> 192.0.2.9:443 uid 1000 gid 1000 via eth0
//	outside udp [2001:db8::9]:40000 -> [fd00:1::5]:80 via eth0
//
// where inside is a socket of the pod's and outside arrives at an interface;
// uid and gid are 0 and the interface is eth0 where they are not given.
func parseConn(line string) (redirect.Conn, error) {
	f := strings.Fields(line)
	if len(f) < 5 || len(f)%2 != 1 || f[3] != "->" {
		return redirect.Conn{}, fmt.Errorf("want SIDE PROTO FROM -> TO [uid N] [gid N] [via IF]")
	}
	c := redirect.Conn{Interface: "eth0", Own: podAddrs}
	var okSide, okProto bool
	c.Chain, okSide = map[string]redirect.Chain{"inside": redirect.ChainOutput, "outside": redirect.ChainPrerouting}[f[0]]
	c.Proto, okProto = map[string]redirect.Proto{"tcp": redirect.ProtoTCP, "udp": redirect.ProtoUDP}[f[1]]
	if !okSide || !okProto {
		return c, fmt.Errorf("want inside or outside, then tcp or udp")
	}
	var err error
	if c.Src, err = netip.ParseAddrPort(f[2]); err != nil {
		return c, err
	}
	if c.Dst, err = netip.ParseAddrPort(f[4]); err != nil {
		return c, err
	}
	for opts := f[5:]; len(opts) > 0; opts = opts[2:] {
		id, err := strconv.ParseUint(opts[1], 10, 32)
		switch opts[0] {
		case "uid":
			c.UID = uint32(id)
		case "gid":
			c.GID = uint32(id)
		case "via":
			c.Interface, err = opts[1], nil
		default:
			err = fmt.Errorf("unknown word %q", opts[0])
		}
		if err != nil {
			return c, err
		}
	}
	return c, nil
}
