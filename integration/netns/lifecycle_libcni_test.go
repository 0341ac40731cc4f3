package netns_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
)

// conflist is what an administrator writes: another project's plugin first,
// Preroute after it.
const conflist = `{
  "cniVersion": %q,
  "name": "preroute-lab",
  "plugins": [
    %s,
    {"type": "preroute", "capabilities": {"io.kubernetes.cri.pod-annotations": true}}
  ]
}`

const hostLocal = `"ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.78.0.0/24"}], [{"subnet": "fd00:78::/64"}]], "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}`

// TestThroughLibcni does what a runtime does: libcni runs a real conflist. The
// node is a network namespace, so that ptp and bridge change it and not the
// machine.
func TestThroughLibcni(t *testing.T) {
	plugins := t.TempDir()
	const tools = "github.com/containernetworking/plugins/plugins/"
	build := exec.Command("go", "build", "-o", plugins, tools+"main/ptp", tools+"main/bridge", tools+"ipam/host-local")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the plugins of others: %v\n%s", err, out)
	}
	for name, first := range map[string]string{
		"ptp":    `{"type": "ptp", "ipMasq": false, "mtu": 1400, ` + hostLocal + `}`,
		"bridge": `{"type": "bridge", "bridge": "cni0", "isGateway": true, ` + hostLocal + `}`,
	} {
		for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
			t.Run(name+" "+version, func(t *testing.T) {
				node, p := bare(t), bare(t)
				text := fmt.Sprintf(conflist, version, fmt.Sprintf(first, t.TempDir()))
				list, err := libcni.NetworkConfFromBytes([]byte(text))
				if err != nil {
					t.Fatal(err)
				}
				cni := libcni.NewCNIConfigWithCacheDir([]string{plugins, filepath.Dir(lab.plugin)}, t.TempDir(), nil)
				rt := &libcni.RuntimeConf{
					ContainerID: p.name, NetNS: p.path, IfName: "eth0",
					CapabilityArgs: map[string]any{annotationsKey: map[string]string{policyAnnotation: policyNGINX, "example.com/other": "x"}},
				}
				ctx := context.Background()
				onNode := func(what string, f func() error) {
					t.Helper()
					if err := in(node.path, f); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
				{
					var result *types100.Result
					onNode("ADD", func() error {
						r, err := cni.AddNetworkList(ctx, list, rt)
						if err != nil {
							return err
						}
						result, err = types100.NewResultFromResult(r)
						return err
					})
					if len(result.IPs) != 2 || len(result.Interfaces) < 2 {
						t.Errorf("the result lost something on its way: %v", result)
					}
					if !strings.Contains(p.exact(), "table inet preroute {") {
						t.Errorf("the pod is not redirected:\n%s", p.exact())
					}
					onNode("CHECK", func() error { return cni.CheckNetworkList(ctx, list, rt) })
					p.exec("nft", "delete", "table", "inet", "preroute")
					if err := in(node.path, func() error { return cni.CheckNetworkList(ctx, list, rt) }); err == nil || !strings.Contains(err.Error(), "inet preroute") {
						t.Errorf("CHECK after the table was deleted: %v", err)
					}
					if version == "1.1.0" {
						onNode("STATUS", func() error { return cni.GetStatusNetworkList(ctx, list) })
						onNode("GC", func() error { return cni.GCNetworkList(ctx, list, &libcni.GCArgs{}) })
					}
					onNode("DEL", func() error { return cni.DelNetworkList(ctx, list, rt) })
					onNode("DEL again", func() error { return cni.DelNetworkList(ctx, list, rt) })
				}
				if out := p.exec("ip", "-o", "link"); strings.Contains(out, "eth0") {
					t.Errorf("DEL left the interface: %s", out)
				}
				if left := ours(node.exact()); left != "" {
					t.Errorf("in the node's namespace there is\n%s", left)
				}

				// A bad policy: the pod does not start, and libcni shows the sentence.
				rt.CapabilityArgs[annotationsKey] = map[string]string{policyAnnotation: `{"v":1,"dns":{"port":"53"}}`}
				err = in(node.path, func() error { _, err := cni.AddNetworkList(ctx, list, rt); return err })
				if err == nil || !strings.Contains(err.Error(), policyAnnotation) || !strings.Contains(err.Error(), `dns.port: "53"`) {
					t.Errorf("a bad policy through libcni: %v", err)
				}
				onNode("DEL of what did not start", func() error { return cni.DelNetworkList(ctx, list, rt) })
			})
		}
	}
}
