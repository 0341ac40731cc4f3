package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/preroute/preroute/plugin/backend"
	"github.com/preroute/preroute/plugin/redirect"
	"golang.org/x/sys/unix"
)

// CNI error codes beside those of the spec, which leaves 100 and above to plugins.
const (
	errNotRedirected = 100 // CHECK: the namespace is not as the policy says
	errApply         = 101 // ADD: the kernel refused, or lacks something
)

// add is the CNI verb ADD.
func add(c *call) error {
	start := time.Now()
	p, err := c.policy(c.pod)
	if err == nil && p == nil {
		return c.passOn()
	}
	r := &report{podArgs: c.pod, Command: "ADD", Time: start.UTC()}
	if err == nil {
		err = c.apply(c.netns, p, r)
	}
	if err == nil {
		err = c.passOn()
	}
	r.finish(asCNIError(err))
	return err
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
	if w := c.wrongType; w != nil && !strings.HasPrefix(w.Field, "runtimeConfig") {
		return 0, nil, &policyError{configSource, fmt.Errorf("%s: a %s: want a value of type %s", w.Field, w.Value, w.Type)}
	}
	if b, err = backend.Choose(c.Backend); err != nil {
		return 0, nil, &policyError{configSource, err}
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
func check(c *call) error {
	p, err := c.policy(c.pod)
	if err != nil || p == nil {
		return err
	}
	ns, b, err := c.open(c.netns)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	if err := b.Check(ns, p); err != nil {
		return types.NewError(errNotRedirected, "preroute: the pod is not redirected as its policy says: "+err.Error(), "")
	}
	return nil
}

// del is the CNI verb DEL. It never fails: what cannot be removed dies with
// the network namespace.
func del(c *call) error {
	c.NodeSocket = "" // what it would say makes no difference any more
	p, err := c.policy(c.pod)
	if err != nil || p == nil || c.netns == "" {
		return nil
	}
	ns, b, err := c.open(c.netns)
	if err != nil {
		c.log().Debug("DEL: nothing to remove", "netns", c.netns, "error", err)
		return nil
	}
	defer unix.Close(ns)
	if err := b.Remove(ns); err != nil {
		c.log().Warn("DEL: rules stay until the network namespace goes", "netns", c.netns, "error", err)
	}
	return nil
}

// passOn prints prevResult as it came: what is in it is other plugins' business.
// One without a version, which the next reader would take for 0.1.0, gets it.
func (c *config) passOn() error {
	fields := map[string]json.RawMessage{}
	if hasValue(c.PrevResult) {
		if err := json.Unmarshal(c.PrevResult, &fields); err != nil {
			return types.NewError(types.ErrDecodingFailure, fmt.Sprintf("prevResult: %v", err), "")
		}
	}
	if v := fields["cniVersion"]; hasValue(v) && string(v) != `""` {
		return printResult(c.PrevResult)
	}
	fields["cniVersion"] = json.RawMessage(strconv.Quote(c.CNIVersion)) // one of specVersions
	return printJSON(fields)
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
