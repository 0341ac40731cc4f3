package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/preroute/preroute/integration/sandbox"
)

const (
	appUID   = 1000
	proxyUID = 2102
	network  = "demo"

	annotationsCapability = "io.kubernetes.cri.pod-annotations"
	policyAnnotation      = "preroute.io/policy"

	demoPolicy = `{"v":1,"proxy":{"uids":[2102]},"inbound":{"port":8901,"exceptPorts":"8887"},` +
		`"outbound":{"port":8900,"exceptPorts":"9443","exceptNets":["198.51.100.99/32","2001:db8:77::99/128"]},"dns":{"port":15053}}`
)

// A runtime does with libcni what containerd and CRI-O do.
type runtime struct {
	cni  *libcni.CNIConfig
	list *libcni.NetworkConfigList
	node *sandbox.Netns // where plugins run

	backend string // of the plugin's configuration
}

func newRuntime(bin, tmp, backend string, node *sandbox.Netns) (*runtime, error) {
	conflist := map[string]any{
		"cniVersion": "1.0.0",
		"name":       network,
		"plugins": []any{
			map[string]any{
				"type": "ptp",
				"ipam": map[string]any{
					"type":    "host-local",
					"dataDir": filepath.Join(tmp, "ipam"),
					"ranges": []any{
						[]any{map[string]string{"subnet": "10.77.0.0/24"}},
						[]any{map[string]string{"subnet": "fd77::/64"}},
					},
					"routes": []any{map[string]string{"dst": "0.0.0.0/0"}, map[string]string{"dst": "::/0"}},
				},
			},
			map[string]any{
				"type":         "preroute",
				"backend":      backend,
				"capabilities": map[string]bool{annotationsCapability: true},
			},
		},
	}
	b, err := json.MarshalIndent(conflist, "", "  ")
	if err != nil {
		return nil, err
	}
	confDir := filepath.Join(tmp, "net.d")
	if err := os.Mkdir(confDir, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(confDir, "10-demo.conflist"), b, 0o644); err != nil {
		return nil, err
	}
	list, err := libcni.LoadNetworkConf(confDir, network)
	if err != nil {
		return nil, err
	}
	// What plugins log goes into a runtime's own log; their errors come in the answer.
	exec := &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: io.Discard}, PluginDecoder: version.PluginDecoder{}}
	cni := libcni.NewCNIConfigWithCacheDir([]string{bin}, filepath.Join(tmp, "cache"), exec)
	return &runtime{cni, list, node, backend}, nil
}

// A pod is a sandbox that the runtime has added to the network.
type pod struct {
	name    string
	netns   *sandbox.Netns
	conf    *libcni.RuntimeConf
	ips     map[int]netip.Addr // by family
	closers []io.Closer
}

// addPod makes a sandbox and adds it to the network. Where that fails, the
// runtime takes it out again, as kubelet has it do.
func (r *runtime) addPod(ctx context.Context, name, policy string) (*pod, error) {
	n, err := newNetns()
	if err != nil {
		return nil, err
	}
	annotations := map[string]string{}
	if policy != "" {
		annotations[policyAnnotation] = policy
	}
	p := &pod{name: name, netns: n, ips: map[int]netip.Addr{}, closers: []io.Closer{n}}
	p.conf = &libcni.RuntimeConf{
		ContainerID:    "demo-" + name,
		NetNS:          n.Path(),
		IfName:         "eth0",
		Args:           [][2]string{{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "demo"}, {"K8S_POD_NAME", name}},
		CapabilityArgs: map[string]any{annotationsCapability: annotations},
	}
	var result types.Result
	err = r.node.Do(func() (err error) {
		result, err = r.cni.AddNetworkList(ctx, r.list, p.conf)
		return err
	})
	if err != nil {
		err = errors.Join(err, r.delPod(ctx, p))
		p.close()
		return nil, err
	}
	res, err := current.GetResult(result)
	if err != nil {
		p.close()
		return nil, err
	}
	for _, ip := range res.IPs {
		a, _ := netip.AddrFromSlice(ip.Address.IP)
		a = a.Unmap()
		family := 6
		if a.Is4() {
			family = 4
		}
		p.ips[family] = a
	}
	if len(p.ips) != 2 {
		p.close()
		return nil, fmt.Errorf("the network gave %d addresses, want one of each family", len(res.IPs))
	}
	return p, nil
}

func (r *runtime) checkPod(ctx context.Context, p *pod) error {
	return r.node.Do(func() error { return r.cni.CheckNetworkList(ctx, r.list, p.conf) })
}

func (r *runtime) delPod(ctx context.Context, p *pod) error {
	return r.node.Do(func() error { return r.cni.DelNetworkList(ctx, r.list, p.conf) })
}

// startApp serves on the ports that the policy redirects (8080) and excepts
// (8887).
func (p *pod) startApp() error {
	for _, port := range []uint16{8080, 8887} {
		closers, err := serve(p.netns, appUID, port, "app")
		p.closers = append(p.closers, closers...)
		if err != nil {
			return err
		}
	}
	return nil
}

func (p *pod) addr(family int, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(p.ips[family], port)
}

func (p *pod) addrs() string { return fmt.Sprintf("%s, %s", p.ips[4], p.ips[6]) }

// own is the pod's addresses as the rules ask for them.
func (p *pod) own() []netip.Addr { return []netip.Addr{p.ips[4], p.ips[6]} }

func (p *pod) close() {
	for _, c := range p.closers {
		c.Close()
	}
}
