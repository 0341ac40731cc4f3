package netfilter

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// newNS makes a network namespace that lives as long as the test. Its thread is
// not given back to the runtime, so that nobody else meets it.
func newNS(t *testing.T) (fd int, run func(args ...string) string) {
	t.Helper()
	type made struct {
		h   netns.NsHandle
		err error
	}
	ready, calls := make(chan made), make(chan func())
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		h, err := netns.New()
		ready <- made{h, err}
		for f := range calls {
			f()
		}
	}()
	m := <-ready
	if m.err != nil {
		t.Fatalf("making a network namespace (this test runs as root): %v", m.err)
	}
	t.Cleanup(func() { close(calls); m.h.Close() })
	return int(m.h), func(args ...string) string {
		t.Helper()
		var out []byte
		var err error
		done := make(chan struct{})
		calls <- func() {
			out, err = exec.Command(args[0], args[1:]...).CombinedOutput()
			close(done)
		}
		<-done
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
}

var spaces = regexp.MustCompile(`\s+`)

// squeeze makes listings comparable: counters at zero, line breaks of long
// element lists gone.
func squeeze(s string) string {
	s = regexp.MustCompile(`packets \d+ bytes \d+`).ReplaceAllString(s, "packets 0 bytes 0")
	s = spaces.ReplaceAllString(s, " ")
	return regexp.MustCompile(`elements = \{[^}]*\}`).ReplaceAllStringFunc(s, func(list string) string {
		items := strings.Split(strings.Trim(list[len("elements = "):], "{ }"), ", ")
		slices.Sort(items) // a hash lists them in the order of its buckets
		return strings.Join(items, ", ")
	})
}

var policies = map[string]string{
	"in":       `{"v":1,"inbound":{"port":8901}}`,
	"out":      `{"v":1,"proxy":{"uids":[2102]},"outbound":{"port":8900,"exceptPorts":"53"}}`,
	"contract": `{"v":1,"proxy":{"uids":[2102],"gids":[7]},"inbound":{"port":8901,"exceptPorts":"8887,8895-8896"},"outbound":{"port":8900,"exceptPorts":"53"},"dns":{"port":15053}}`,
	"lists": `{"v":1,"proxy":{"uids":[0,2102,4294967294],"gids":[1337,7]},"inbound":{"port":8901,"ports":"80,443,9000-9100,65535","exceptPorts":"1-3","exceptSources":["10.0.0.0/8","fd00::/8","10.0.0.0/9","192.168.1.1/32"]},
	  "outbound":{"port":8900,"ports":"1-65535","exceptPorts":"53","nets":["0.0.0.0/0","::/0"],"exceptNets":["10.0.0.0/24","10.0.1.0/24","fd00::1/128","255.255.255.255/32"],"exceptUIDs":[0,1]},"exceptInterfaces":["eth1","net2"]}`,
	"hairpin":        `{"v":1,"proxy":{"uids":[1337],"gids":[1337],"hairpin":true},"inbound":{"port":15006},"outbound":{"port":15001},"dns":{"port":15053}}`,
	"tproxy":         `{"v":1,"proxy":{"uids":[1337],"gids":[1338]},"inbound":{"port":15006,"mode":"tproxy","exceptPorts":"22"},"outbound":{"port":15001}}`,
	"tproxy-hairpin": `{"v":1,"proxy":{"uids":[1337,1338],"hairpin":true},"inbound":{"port":15006,"mode":"tproxy"},"exceptInterfaces":["eth1"]}`,
	"v6nets":         `{"v":1,"outbound":{"port":8900,"nets":["fd00::/8"]}}`,
	"dns":            `{"v":1,"proxy":{"uids":[1]},"dns":{"port":5353},"outbound":{"port":0,"exceptNets":["10.0.0.0/8","fd00::/8","11.0.0.0/9"],"exceptUIDs":[5,6]}}`,
}

func init() { // lists long enough for hashes
	var ports, nets []string
	for i := range 2 * hashFrom {
		ports = append(ports, fmt.Sprint(1000+3*i))
		nets = append(nets, fmt.Sprintf(`"10.0.%d.0/25","fd00:0:0:%x::/64","172.16.0.%d/32"`, i, i, i))
	}
	policies["long"] = fmt.Sprintf(`{"v":1,"inbound":{"port":8901,"exceptPorts":"%s,9000-9010","exceptSources":[%s]},
	  "outbound":{"port":8900,"ports":"%[1]s,5-6","exceptPorts":"%[1]s","exceptNets":[%[2]s,"11.0.0.0/8","fe00::/9"],"nets":[%[2]s,"12.0.0.0/8"]},"dns":{"port":53}}`,
		strings.Join(ports, ","), strings.Join(nets, ","))
}

func parse(t *testing.T, text string) *redirect.Policy {
	t.Helper()
	p, err := redirect.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// What Apply sends is what the text says, what nft(8) makes of that text, and
// what Check wants.
func TestNFTIsItsText(t *testing.T) {
	for name, text := range policies {
		t.Run(name, func(t *testing.T) {
			p := parse(t, text)
			ns, run := newNS(t)
			if changed, err := (NFT{}).Apply(ns, p); err != nil || !changed {
				t.Fatalf("Apply: %v, %v", changed, err)
			}
			got := run("nft", "list", "ruleset")
			if squeeze(got) != squeeze(Ruleset(p)) {
				t.Errorf("the kernel lists\n%s\nnot\n%s", got, Ruleset(p))
			}
			if err := (NFT{}).Check(ns, p); err != nil {
				t.Errorf("Check: %v", err)
			}
			before := run("nft", "-a", "list", "ruleset")
			if changed, err := (NFT{}).Apply(ns, p); err != nil || changed {
				t.Errorf("Apply again: %v, %v", changed, err)
			}
			if after := run("nft", "-a", "list", "ruleset"); after != before {
				t.Errorf("applied twice:\n%s\nnot\n%s", after, before)
			}
			if err := (NFT{}).Remove(ns); err != nil {
				t.Error(err)
			}
			if got := run("nft", "list", "ruleset"); got != "" {
				t.Errorf("left behind:\n%s", got)
			}
			if got := run("ip", "rule") + run("ip", "-6", "rule"); strings.Contains(got, "28786") {
				t.Errorf("left behind:\n%s", got)
			}
		})
	}
}

// The golden files are what nft list ruleset shows, counters at zero.
func TestRuleset(t *testing.T) {
	files, err := filepath.Glob("../redirect/testdata/*/policy.json")
	if err != nil || len(files) == 0 {
		t.Fatalf("no policies in ../redirect/testdata: %v", err)
	}
	for _, file := range files {
		name := filepath.Base(filepath.Dir(file))
		t.Run(name, func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", "nft", name+".nft")
			got := Ruleset(parse(t, string(text)))
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s: Ruleset prints\n%s\nnot\n%s", golden, got, want)
			}
		})
	}
}

// A kernel that lacks something is told by what it refuses: here one that has
// no chain type of that name.
func TestExplainNamesTheFeature(t *testing.T) {
	ns, _ := newNS(t)
	c, err := openNFT(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	for _, f := range nftFeatures() {
		if err := c.probe(f); err != nil {
			t.Errorf("this kernel has %s, and the probe says: %v", f.what, err)
		}
		f.typ = "nosuch"
		if err := c.probe(f); !errors.Is(err, unix.ENOENT) {
			t.Errorf("probe of a chain type that does not exist: %v", err)
		}
	}
}
