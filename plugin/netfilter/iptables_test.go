package netfilter

import (
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/preroute/preroute/plugin/redirect"
)

var update = flag.Bool("update", false, "write testdata anew from what the code does")

// goldenPolicies are the policies that package redirect prints, and those of
// testdata/iptables that only iptables has trouble with.
func goldenPolicies(t *testing.T) map[string]*redirect.Policy {
	t.Helper()
	out := map[string]*redirect.Policy{}
	for _, pattern := range []string{"../redirect/testdata/*/policy.json", "testdata/iptables/*/policy.json"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("no policies in %s (%v)", pattern, err)
		}
		for _, file := range files {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			p := parse(t, string(b))
			p.UDP = redirect.UDP{} // not of this backend; TestIPTablesRefuses
			out[filepath.Base(filepath.Dir(file))] = p
		}
	}
	return out
}

// What iptables-restore is given, for both families, is what a person can read
// in testdata/iptables.
func TestRestoreInput(t *testing.T) {
	for name, p := range goldenPolicies(t) {
		for file, is4 := range map[string]bool{"v4.rules": true, "v6.rules": false} {
			file = filepath.Join("testdata/iptables", name, file)
			got := RestoreInput(p, is4)
			if *update {
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("%s: RestoreInput prints\n%s\nnot\n%s", file, got, want)
			}
		}
	}
}

// flavoured makes a backend that finds the programs of one flavour only, as on a
// machine that has no other.
func flavoured(t *testing.T, f flavour) *IPTables {
	t.Helper()
	dir := t.TempDir()
	for _, base := range []string{"iptables", "ip6tables"} {
		for _, what := range []string{"restore", "save"} {
			name := base + "-" + string(f) + "-" + what
			if err := os.Symlink("/usr/sbin/"+name, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return &IPTables{path: dir}
}

// saved is what iptables-save of both families shows, less what varies.
func saved(run func(...string) string, f flavour) string {
	s := save(run, "iptables-", f) + save(run, "ip6tables-", f)
	s = regexp.MustCompile(`(?m)^#.*\n`).ReplaceAllString(s, "")
	return regexp.MustCompile(`\[\d+:\d+\]`).ReplaceAllString(s, "[0:0]")
}

// save leaves out the warning that the other flavour has rules too.
func save(run func(...string) string, family string, f flavour) string {
	return run("sh", "-c", family+string(f)+"-save 2>/dev/null")
}

func eachFlavour(t *testing.T, f func(t *testing.T, b *IPTables, f flavour)) {
	for _, flavour := range []flavour{flavourNft, flavourLegacy} {
		t.Run(string(flavour), func(t *testing.T) { f(t, flavoured(t, flavour), flavour) })
	}
}

// Every policy, in both flavours: what iptables-save prints is what was asked
// for, a second time changes nothing, and removal leaves nothing of ours.
func TestIPTablesApplyTwiceAndRemove(t *testing.T) {
	eachFlavour(t, func(t *testing.T, b *IPTables, f flavour) {
		for name, p := range goldenPolicies(t) {
			t.Run(name, func(t *testing.T) {
				ns, run := newNS(t)
				before := run("nft", "list", "ruleset")
				changed, err := b.Apply(ns, p)
				if err != nil || changed == p.IsZero() {
					t.Fatalf("Apply: changed=%v, %v", changed, err)
				}
				once := run("iptables-"+string(f)+"-save", "-c") + run("nft", "-a", "list", "ruleset")
				if changed, err := b.Apply(ns, p); err != nil || changed {
					t.Errorf("Apply again: changed=%v, %v", changed, err)
				}
				if err := b.Check(ns, p); err != nil {
					t.Errorf("Check: %v", err)
				}
				if got := run("iptables-"+string(f)+"-save", "-c") + run("nft", "-a", "list", "ruleset"); stripDates(got) != stripDates(once) {
					t.Errorf("applied twice:\n%s\nnot\n%s", got, once)
				}
				if err := b.Remove(ns); err != nil {
					t.Fatal(err)
				}
				if got := run("nft", "list", "ruleset"); f == flavourNft && got != before {
					t.Errorf("removal left\n%s", got)
				}
				if got := saved(run, f); strings.Contains(got, "PREROUTE") || strings.Contains(got, "-A ") {
					t.Errorf("removal left\n%s", got)
				}
				if f == flavourNft {
					if got := run("cat", "/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"); got != "" {
						t.Errorf("the nft flavour made the legacy tables %q", got)
					}
				}
			})
		}
	})
}

func stripDates(s string) string {
	return regexp.MustCompile(`(?m)^# (Generated|Completed).*\n`).ReplaceAllString(s, "")
}
