package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"
	"github.com/preroute/preroute/plugin/backend"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// CNI error codes beside those of the spec, which leaves 100 and above to plugins.
const (
	errNotRedirected = 100 // CHECK: the namespace is not as the policy says
	errApply         = 101 // ADD: the kernel refused, or lacks something
)

func versions() cniversion.PluginInfo {
	return cniversion.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0")
}

func specVersions() string { return strings.Join(versions().SupportedVersions(), ", ") }

func runCNI() int {
	// skel would open the pod's network namespace and its own after ADD and DEL
	// have run: for pods without a policy nothing is to be opened, for the others
	// openNetNS has refused the host's before anything was changed.
	os.Setenv("CNI_NETNS_OVERRIDE", "1")
	err := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add:    add,
		Check:  check,
		Del:    del,
		GC:     func(*skel.CmdArgs) error { return nil }, // the rules die with the namespace: nothing is kept elsewhere
		Status: func(*skel.CmdArgs) error { return nil }, // an error would make the node NotReady for every pod
	}, versions(), "")
	if err == nil {
		return exitOK
	}
	if printErr := err.Print(); printErr != nil {
		slog.Error("writing the CNI error to stdout", "error", printErr)
	}
	return exitFailed
}

// add is the CNI verb ADD.
func add(args *skel.CmdArgs) error {
	start := time.Now()
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	pod := podOf(args)
	p, err := c.policy(pod)
	if err == nil && p == nil {
		return c.passOn()
	}
	r := &report{podArgs: pod, Command: "ADD", Time: start.UTC()}
	if err == nil {
		err = c.apply(args.Netns, p, r)
	}
	cniErr := asCNIError(err)
	if cniErr == nil {
		if err := c.passOn(); err != nil {
			return err
		}
	}
	r.finish(cniErr)
	if cniErr != nil {
		return cniErr
	}
	return nil
}

func podOf(args *skel.CmdArgs) podArgs {
	pod := parsePodArgs(args.Args)
	pod.ContainerID, pod.NetNS, pod.IfName = args.ContainerID, args.Netns, args.IfName
	return pod
}

func (c *config) apply(path string, p *redirect.Policy, r *report) error {
	ns, b, err := c.open(path)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	r.Changed, err = b.Apply(ns, p)
	r.Backend, r.Reason = b.Name(), b.Reason
	if err != nil {
		return types.NewError(errApply, "preroute: redirecting the pod: "+err.Error(), "")
	}
	c.log().Debug("applied", "netns", path, "backend", r.Backend, "reason", r.Reason, "changed", r.Changed, "policy", p)
	return nil
}

func (c *config) open(path string) (ns int, b *backend.Choice, err error) {
	if err := c.validate(); err != nil {
		return 0, nil, types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	if b, err = backend.Choose(c.Backend); err != nil {
		return 0, nil, err
	}
	ns, err = openNetNS(path)
	return ns, b, err
}

func (r *report) finish(err *types.Error) {
	r.Seconds = time.Since(r.Time).Seconds()
	r.Result = "ok"
	if err != nil {
		r.Result, r.Code, r.Error = "error", err.Code, err.Error()
	}
	r.send()
}

// check is the CNI verb CHECK.
func check(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return types.NewError(types.ErrDecodingFailure, err.Error(), "")
	}
	p, err := c.policy(podOf(args))
	if err != nil {
		return asCNIError(err)
	}
	if p == nil {
		return nil
	}
	ns, b, err := c.open(args.Netns)
	if err != nil {
		return asCNIError(err)
	}
	defer unix.Close(ns)
	if err := b.Check(ns, p); err != nil {
		return types.NewError(errNotRedirected, "preroute: the pod is not redirected as its policy says: "+err.Error(), "")
	}
	return nil
}

// del is the CNI verb DEL. It never fails: what cannot be removed dies with
// the network namespace.
func del(args *skel.CmdArgs) error {
	c, err := parseConfig(args.StdinData)
	if err != nil {
		return nil
	}
	c.NodeSocket = "" // what it would say makes no difference any more
	p, err := c.policy(podOf(args))
	if err != nil || p == nil || args.Netns == "" {
		return nil
	}
	ns, b, err := c.open(args.Netns)
	if err != nil {
		c.log().Debug("DEL: nothing to remove", "netns", args.Netns, "error", err)
		return nil
	}
	defer unix.Close(ns)
	if err := b.Remove(ns); err != nil {
		c.log().Warn("DEL: rules stay until the network namespace goes", "netns", args.Netns, "error", err)
	}
	return nil
}

// passOn prints prevResult as it came: what is in it is other plugins' business.
// One without a version, which the next reader would take for 0.1.0, gets it.
func (c *config) passOn() error {
	result := c.PrevResult
	var v struct {
		CNIVersion string `json:"cniVersion"`
	}
	if hasValue(result) {
		if err := json.Unmarshal(result, &v); err != nil {
			return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: %v", err), "")
		}
	}
	if v.CNIVersion == "" {
		fields := map[string]json.RawMessage{}
		if hasValue(result) {
			if err := json.Unmarshal(result, &fields); err != nil {
				return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: %v", err), "")
			}
		}
		version, err := json.Marshal(c.CNIVersion)
		if err != nil {
			return err
		}
		fields["cniVersion"] = version
		if result, err = json.Marshal(fields); err != nil {
			return err
		}
	}
	if _, err := os.Stdout.Write(append(result, '\n')); err != nil {
		return types.NewError(types.ErrIOFailure, fmt.Sprintf("writing the result to stdout: %v", err), "")
	}
	return nil
}

// asCNIError gives every error its code. What is wrong in a policy is 7,
// "invalid network config", and its text names annotation, field and value:
// it is what kubectl describe pod shows.
func asCNIError(err error) *types.Error {
	if err == nil {
		return nil
	}
	var coded *types.Error
	var bad *policyError
	switch {
	case errors.As(err, &coded):
		return coded
	case errors.As(err, &bad):
		return types.NewError(types.ErrInvalidNetworkConfig, err.Error(), "")
	}
	return types.NewError(types.ErrTryAgainLater, "preroute: "+err.Error(), "")
}

func (c *config) log() *slog.Logger {
	level := slog.LevelInfo
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		level = slog.LevelInfo
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}
