package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/preroute/preroute/plugin/netfilter"
	"github.com/preroute/preroute/plugin/redirect"
)

// Annotations of a pod that the plugin reads.
const (
	policyAnnotation = "preroute.io/policy"
	pathAnnotation   = "preroute.io/path"
)

// annotationsCapability is the runtimeConfig entry in which containerd (1.5.0
// and later) and CRI-O pass the annotations of the pod.
const annotationsCapability = "io.kubernetes.cri.pod-annotations"

// config is the plugin's entry in the conflist, with what the runtime adds.
type config struct {
	CNIVersion        string          `json:"cniVersion"`
	Name              string          `json:"name"`
	Backend           string          `json:"backend"`
	Policy            json.RawMessage `json:"policy"`
	NodeSocket        string          `json:"nodeSocket"`
	ExcludeNamespaces []string        `json:"excludeNamespaces"`
	LogLevel          string          `json:"logLevel"`
	RuntimeConfig     struct {
		Annotations map[string]string `json:"io.kubernetes.cri.pod-annotations"`
	} `json:"runtimeConfig"`
	PrevResult json.RawMessage `json:"prevResult"`

	wrongType *json.UnmarshalTypeError // the first key of a wrong type, kept for pods that have a policy
}

// configSource is how errors call the configuration.
const configSource = "network configuration"

// defaultExcluded are the namespaces whose pods start also while the node's
// socket does not answer: without them the cluster could not heal it.
var defaultExcluded = []string{"kube-system", "kube-public", "kube-node-lease", "preroute-system"}

// parseConfig decodes what the runtime sends. A key of a wrong type does not make
// it fail: whether the pod has a policy decides what that means.
func parseConfig(stdin []byte) (*config, error) {
	c := &config{ExcludeNamespaces: defaultExcluded}
	err := json.Unmarshal(stdin, c)
	// encoding/json goes on after a value of a wrong type, and decodes the rest.
	if errors.As(err, &c.wrongType) {
		c.RuntimeConfig.Annotations = soundAnnotations(stdin)
		return c, nil
	}
	if err != nil {
		return nil, fmt.Errorf("network configuration: %w", err)
	}
	return c, nil
}

// soundAnnotations keeps of annotations that are not all strings what concerns
// the plugin: a value that is no string as its JSON, which no policy is.
func soundAnnotations(stdin []byte) map[string]string {
	var c struct {
		RuntimeConfig map[string]json.RawMessage `json:"runtimeConfig"`
	}
	var all map[string]json.RawMessage
	if json.Unmarshal(stdin, &c) != nil || json.Unmarshal(c.RuntimeConfig[annotationsCapability], &all) != nil {
		return nil
	}
	out := map[string]string{}
	for _, name := range []string{policyAnnotation, pathAnnotation} {
		raw, there := all[name]
		var s string
		switch {
		case !there || string(raw) == "null":
		case json.Unmarshal(raw, &s) == nil:
			out[name] = s
		default:
			out[name] = "not a string: " + string(raw)
		}
	}
	return out
}

// policy says what the pod asks for: the annotation, else the configuration's
// policy, else what the node's socket answers. nil means that the pod has none,
// and then nothing has been opened but the socket, where one is configured.
func (c *config) policy(pod podArgs) (*redirect.Policy, error) {
	source := policyAnnotation
	text, has := c.RuntimeConfig.Annotations[policyAnnotation]
	if !has && hasValue(c.Policy) {
		source, text, has = configSource+": policy", string(c.Policy), true
	}
	if path, ok := c.RuntimeConfig.Annotations[pathAnnotation]; ok {
		switch path {
		case "cni":
		case "init", "none":
			return nil, nil
		default:
			if has {
				return nil, &policyError{pathAnnotation, fmt.Errorf("%.80q: want cni, init or none", path)}
			}
		}
	}
	if !has && c.NodeSocket != "" {
		answer, err := askNode(c.NodeSocket, pod)
		if err != nil {
			if slices.Contains(c.ExcludeNamespaces, pod.Namespace) {
				return nil, nil
			}
			return nil, err
		}
		if answer.Path == "init" || answer.Path == "none" || answer.Policy == "" {
			return nil, nil
		}
		source, text, has = "policy from "+c.NodeSocket, answer.Policy, true
	}
	if !has {
		return nil, nil
	}
	p, err := redirect.Parse(text)
	if err == nil {
		err = netfilter.Supported(p)
	}
	if err != nil {
		return nil, &policyError{source, err}
	}
	return p, nil
}

func hasValue(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }

// A policyError is a mistake in what the pod or the configuration says.
type policyError struct {
	source string
	err    error
}

func (e *policyError) Error() string { return e.source + ": " + e.err.Error() }
func (e *policyError) Unwrap() error { return e.err }
