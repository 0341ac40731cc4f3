package netns_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// TestManyPods adds, checks and deletes 500 pods in a random order, eight at
// once, and kills the plugin in between as a runtime's timeout does. Nothing may
// be left: no namespace, mount, process, or file.
func TestManyPods(t *testing.T) {
	const pods, atOnce = 500, 8
	policies := []string{policyNGINX, policyKuma, policyTProxy, ""}
	want := map[string]string{}
	for _, policy := range policies {
		want[policy] = freshly(t, policy)
	}
	before := remains(t)
	r := rand.New(rand.NewPCG(5, 5))
	queue := make(chan int64)
	var done sync.WaitGroup
	for range atOnce {
		done.Go(func() {
			for seed := range queue {
				if err := life(t, rand.New(rand.NewPCG(uint64(seed), 1)), policies, want); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range pods {
		queue <- r.Int64()
	}
	close(queue)
	done.Wait()
	eventually(t, "no process of the plugin's is left", func() bool { return len(processes()) == 0 })
	same(t, "left behind", remains(t), before)
}

// life is one pod from its making to its end.
func life(t *testing.T, r *rand.Rand, policies []string, want map[string]string) error {
	p := barePod(t)
	if err := makeNetns(p.name); err != nil {
		return fmt.Errorf("making %s: %w", p.path, err)
	}
	defer netns.DeleteNamed(p.name)
	policy := policies[r.IntN(len(policies))]
	fail := func(what string, r result, err error) error {
		return fmt.Errorf("%s of %s: %v, %v", what, p.name, err, r.err())
	}
	// Kills and deletions first, in any number and order; then one good ADD.
	for range r.IntN(3) {
		switch r.IntN(3) {
		case 0:
			l := p.launch("ADD", policies[r.IntN(len(policies))])
			l.killIn = time.Duration(1 + r.IntN(6000000))
			if _, err := l.run(); err != nil {
				return err
			}
		case 1:
			if res, err := p.launch("DEL", policy).run(); err != nil || res.exit != 0 {
				return fail("DEL before ADD", res, err)
			}
		case 2:
			p.launch("CHECK", policy).run() // either way
		}
	}
	if policy == "" {
		// A pod's annotations do not change, so no kill left anything of ours.
		if res, err := p.launch("ADD", policyNone).run(); err != nil || res.exit != 0 {
			return fail("removal", res, err)
		}
	}
	for _, command := range []string{"ADD", "CHECK"} {
		if res, err := p.launch(command, policy).run(); err != nil || res.exit != 0 {
			return fail(command, res, err)
		}
	}
	if r.IntN(10) == 0 { // a look at everything costs more than an ADD
		state, err := exactly(p.path)
		if err != nil {
			return err
		}
		if shape(state) != want[policy] {
			return fmt.Errorf("%s is not as its policy says:\n%s", p.name, lineDiff(want[policy], shape(state)))
		}
	}
	gone := r.IntN(2) == 0
	if gone {
		if err := netns.DeleteNamed(p.name); err != nil {
			return err
		}
	}
	for range 1 + r.IntN(2) {
		if res, err := p.launch("DEL", policy).run(); err != nil || res.exit != 0 {
			return fail("DEL", res, err)
		}
	}
	return nil
}

// remains lists what a pod or the plugin could leave on the machine.
func remains(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	pid := fmt.Sprint(netnsPrefix, os.Getpid(), "-")
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, pid) || strings.Contains(line, " /run/preroute") {
			b.WriteString(line)
		}
	}
	for _, pattern := range []string{
		filepath.Join(netnsFolder, pid+"*"), "/run/preroute/*", "/var/lib/preroute*", "/var/run/preroute*", "/tmp/preroute.*", lab.dir + "/*",
	} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		slices.Sort(names)
		fmt.Fprintln(&b, names)
	}
	return b.String()
}

// processes are those that run the built plugin.
func processes() []string {
	var found []string
	links, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, link := range links {
		if exe, err := os.Readlink(link); err == nil && strings.HasPrefix(exe, lab.plugin) {
			found = append(found, link)
		}
	}
	return found
}
