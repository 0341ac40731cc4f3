package main_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Every pod on a node pays for what the plugin imports: the Kubernetes types
// alone cost 2 ms of CPU for each ADD, client-go 10.
func TestPluginImportsNothingHeavy(t *testing.T) {
	heavy := []string{"k8s.io/", "net/http", "go.opentelemetry.io/", "google.golang.org/", "github.com/preroute/preroute/integration"}
	for _, dep := range goList(t, "-deps", ".") {
		for _, h := range heavy {
			if dep == strings.TrimSuffix(h, "/") || strings.HasPrefix(dep, h) || strings.Contains(dep, "."+h) {
				t.Errorf("the plugin depends on %s; `go list -deps ./plugin` shows by which way", dep)
			}
		}
	}
}

// The domain is values in, values out: nothing but the standard library.
func TestRedirectImportsStandardLibraryOnly(t *testing.T) {
	for _, dep := range goList(t, "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "./redirect") {
		if dep != "" && dep != "github.com/preroute/preroute/plugin/redirect" {
			t.Errorf("redirect depends on %s", dep)
		}
	}
}

func TestBinaryIsSmall(t *testing.T) {
	const limit = 6 << 20
	bin := filepath.Join(t.TempDir(), "preroute")
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", bin, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	info, err := os.Stat(bin)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size() > limit {
		t.Errorf("the binary has %d bytes, more than %d", info.Size(), limit)
	}
	t.Logf("the binary has %.2f MiB", float64(info.Size())/(1<<20))
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	out, err := exec.Command("go", append([]string{"list"}, args...)...).Output()
	if err != nil {
		t.Fatalf("go list %s: %v", strings.Join(args, " "), err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}
